"""The report that people look at: what logs say, as one page that needs nothing else, and as files for papers."""
