"""`coati label`: people compare responses on a web page, and what they choose becomes preference data."""
