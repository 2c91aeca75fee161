"""A reader for each published form of Persona-Chat, and what recognizes them by their content."""
