"""The studies behind the method, as experiments that anyone can replay."""
