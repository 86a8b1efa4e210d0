"""Named methods: a paper's settings and the stages they become. docs/papers.md has the table."""
