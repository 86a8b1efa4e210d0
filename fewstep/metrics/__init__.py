"""How good and how varied pictures are, and how equal two hosts' pictures are.

Works on feature and image arrays in numpy. Knows nothing of models, prompts or files.
"""
