"""Population x tasks -> score matrix. May import models and tasks; knows no search and no file format."""
