"""Which token goes to which expert, with which weight, and what does balance cost?"""
