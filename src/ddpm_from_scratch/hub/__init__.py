"""A model's page and repository on the Hub, and its demo."""
