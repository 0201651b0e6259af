"""How are the experts' matrix products computed?"""
