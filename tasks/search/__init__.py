"""The search: trials from ask to tell, in waves, until the budget is used up."""
