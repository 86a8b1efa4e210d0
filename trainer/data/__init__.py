"""What a run is fed with: prompts, pictures and latents, read, checked, encoded once and cached."""
