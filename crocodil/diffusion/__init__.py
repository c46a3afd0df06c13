"""The two noise processes as pure mathematics; t = 1 is noise in both."""
