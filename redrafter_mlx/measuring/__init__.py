"""What passes and drafts cost here, what is accepted, and where that is kept."""
