"""Sample quality against real images, and likelihoods of held-out images."""
