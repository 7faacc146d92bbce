"""The spec file: its models, how it is read, the registries of what it may name, and the grammar of patterns."""
