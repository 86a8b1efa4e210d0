"""The model's edge: one file per pipeline family, stock `from_pretrained` does the loading."""
