"""People, and models, as judges: votes, the preferences that they show, and the page on which people vote."""
