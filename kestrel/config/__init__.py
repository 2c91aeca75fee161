"""Settings: what a YAML file may say, and how it is checked, with file and line."""
