// All that the -inl.h files include. It comes before a target region opens (cpu/simd.h says why).

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>

#include "core/sum16.h"
#include "core/fixed.h"
#include "core/mask.h"
#include "core/order.h"
#include "core/params.h"
#include "core/scan.h"
#include "core/widen.h"
#include "cpu/grid.h"
#include "cpu/kernels.h"
#include "cpu/scan.h"
#include "cpu/simd.h"
