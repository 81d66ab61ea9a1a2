"""The model's files on the Hugging Face Hub: which there are, how they are fetched, where they are put."""
