"""The embedded default: a tiny text-to-image Stable Diffusion of handwritten digits, and its distillation."""
