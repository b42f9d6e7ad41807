"""The results of calls: frozen records with methods that query and export them."""
