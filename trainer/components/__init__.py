"""The units that methods are made of, each with a closed-form test; docs/papers.md maps them."""
