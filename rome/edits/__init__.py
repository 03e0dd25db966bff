"""What an edit does to a model, many edits of one model, and edits as files."""
