"""Commands of compression: recipes, the search for the cheapest model within a budget, and what it is held against."""
