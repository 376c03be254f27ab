"""The mathematics of DDPM, the network, and the pipeline: all that travels inside a saved model's pipeline.py."""
