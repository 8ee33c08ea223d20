// How addresses cross from Python: as integers.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "common.h"

namespace finback {

namespace nb = nanobind;

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// A field that is an address, written as an integer.
template <class Class, class T>
void address(nb::class_<Class>& bound, const char* name, T* Class::*field) {
    bound.def_prop_rw(
        name, [field](const Class& self) { return reinterpret_cast<uintptr_t>(self.*field); },
        [field](Class& self, uintptr_t value) { self.*field = at<T>(value); });
}

}  // namespace finback
