"""How does backward come to make the gradient of a slice alone, and what is such a gradient to others?"""
