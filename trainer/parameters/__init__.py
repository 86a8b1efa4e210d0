"""What is trained: adapters and own networks of roles on one frozen base."""
