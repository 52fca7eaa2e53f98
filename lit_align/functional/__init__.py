"""Pure tensor functions shared by two or more methods."""
