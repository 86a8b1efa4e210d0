"""The parity gate: an artefact is published if it is right and not slower than what it replaces."""
