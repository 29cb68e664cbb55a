"""Measurements of a video model: its loss on held-out clips, and the films it makes."""
