"""What is wrong with this pipeline or adapter, in sentences."""
