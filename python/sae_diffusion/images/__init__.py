"""Small images by diffusion in any orthonormal basis, with any schedule for each component."""
