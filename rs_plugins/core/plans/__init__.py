"""Plans: how many votes an image needs, and what they prove. One plan per module."""
