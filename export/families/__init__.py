"""What each family of pipelines is exported as."""
