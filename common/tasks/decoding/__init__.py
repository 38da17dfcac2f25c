"""How a language model's answers are made."""
