"""Scores of latents: what they fire on, what they do, and how well they tell texts apart."""
