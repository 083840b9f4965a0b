"""Tests of the machinery: the packages and programs of the generated project that users do not edit."""
