"""One file for each framework that peftstate works with; each is imported only when used."""
