"""What an edited model says: probabilities, generated text and what the text is worth."""
