// What the -inl.h files need of the standard library and the core, included before a target region opens.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "core/canonical.h"
#include "core/mask.h"
#include "core/order.h"
#include "core/params.h"
#include "core/scan.h"
#include "core/widen.h"
#include "cpu/grid.h"
#include "cpu/kernels.h"
#include "cpu/scan.h"
#include "cpu/simd.h"
