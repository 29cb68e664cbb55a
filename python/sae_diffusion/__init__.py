"""World models on top of sae_kernels: model, diffusion, data and training."""
