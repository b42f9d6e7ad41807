"""What calls return: frozen records with the questions that one asks them."""
