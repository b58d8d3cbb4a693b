"""The recipe: every setting of a run, by section; `recipe.load_recipe` reads and validates one."""
