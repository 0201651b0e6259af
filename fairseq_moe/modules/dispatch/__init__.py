"""How do rows reach the experts and come back?"""
