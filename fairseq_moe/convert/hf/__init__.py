"""What does a Hugging Face directory say, and how is one written?"""
