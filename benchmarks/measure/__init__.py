"""What is measured: this program, its peers, the card and its ceilings."""
