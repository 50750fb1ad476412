"""The first embedded problem: a tiny text-to-image Stable Diffusion of handwritten digits, and what judges it."""
