"""The recipe: every setting of a run, one file for each group of sections; `recipe.recipe.load_recipe` reads and validates one."""
