"""The mathematics of diffusion and of ILVR: imports torch and nothing else of the project."""
