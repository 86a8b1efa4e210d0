"""How each family of models is driven: prompts to conditions, latents to network inputs."""
