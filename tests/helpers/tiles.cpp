// Emulates the instructions of AMX tiles, for CPUs that lack them: those raise SIGILL, whose handler does what they say.
//
//   ctypes.CDLL("libtiles.so", ctypes.RTLD_GLOBAL)   before cu_fast is imported: CU_FAST_SIMD=amx is accepted then
//
// The code that runs is the library's own, instruction by instruction. Known: ldtilecfg, tilerelease, tilezero, tileloadd,
// tilestored, tdpbssd, tdpbsud. Any other illegal instruction, or a use that the manual forbids (a tile that is not
// configured, three operands that are not three tiles), ends the process with a message.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include <csignal>
#include <ucontext.h>

namespace {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

struct State {
  Config config;
  uint8_t tiles[8][16][64];
};

// A thread takes one of these when it first uses tiles: a handler must not allocate, and neither does initial-exec.
State states[256];
int taken = 0;
__attribute__((tls_model("initial-exec"))) thread_local State* own = nullptr;

long executed = 0;

[[noreturn]] void fail(const char* why, const uint8_t* code) {
  std::fprintf(stderr, "tiles: %s, at %02x %02x %02x %02x %02x %02x\n", why, code[0], code[1], code[2], code[3], code[4],
               code[5]);
  std::abort();
}

int64_t register_of(const ucontext_t* context, int number) {
  static constexpr int kPlaces[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                    REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context->uc_mcontext.gregs[kPlaces[number]];
}

// What follows the opcode: ModRM, and for memory SIB and displacement.
struct Operand {
  int mode, reg, rm, length;
  bool has_index;
  int64_t base, index;  // the address is base + index; tiles take rows from base + row * index
};

Operand read_operand(const ucontext_t* context, const uint8_t* at, int vex1, int64_t next) {
  Operand operand = {at[0] >> 6, at[0] >> 3 & 7, at[0] & 7, 1, false, 0, 0};
  if (operand.mode == 3) return operand;
  const int base_high = vex1 & 0x20 ? 0 : 8, index_high = vex1 & 0x40 ? 0 : 8;
  int base = operand.rm, displacement = operand.mode == 1 ? 1 : operand.mode == 2 ? 4 : 0;
  bool has_base = true;
  if (operand.rm == 4) {
    const int sib = at[operand.length++], index = (sib >> 3 & 7) + index_high;
    operand.has_index = index != 4;
    if (operand.has_index) operand.index = register_of(context, index) << (sib >> 6);
    base = sib & 7;
    if (base == 5 && operand.mode == 0) has_base = false, displacement = 4;
  } else if (operand.rm == 5 && operand.mode == 0) {  // relative to the next instruction
    int32_t offset;
    std::memcpy(&offset, at + 1, 4);
    operand.base = next + 5 + offset, operand.length = 5;
    return operand;
  }
  if (has_base) operand.base = register_of(context, base + base_high);
  if (displacement == 1) operand.base += static_cast<int8_t>(at[operand.length]);
  if (displacement == 4) {
    int32_t offset;
    std::memcpy(&offset, at + operand.length, 4);
    operand.base += offset;
  }
  operand.length += displacement;
  return operand;
}

void check_tile(int tile, const uint8_t* code) {
  const Config& config = own->config;
  if (config.palette != 1) fail("tiles are not configured", code);
  if (config.rows[tile] != 16 || config.row_bytes[tile] != 64) fail("a tile is not 16 rows of 64 bytes", code);
}

// sum += a b: four bytes at a time, a signed, b signed or not. Wraps, as the CPU does.
void multiply(int sum, int a, int b, bool is_signed, const uint8_t* code) {
  auto& tiles = own->tiles;
  if (sum == a || sum == b || a == b) fail("a product of tiles that are not three", code);
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      uint32_t total;
      std::memcpy(&total, &tiles[sum][m][4 * n], 4);
      for (int k = 0; k < 16; ++k) {
        for (int i = 0; i < 4; ++i) {
          const int x = static_cast<int8_t>(tiles[a][m][4 * k + i]), y = tiles[b][k][4 * n + i];
          total += static_cast<uint32_t>(x * (is_signed ? static_cast<int8_t>(y) : y));
        }
      }
      std::memcpy(&tiles[sum][m][4 * n], &total, 4);
    }
  }
}

void execute(int, siginfo_t*, void* context_pointer) {
  auto* const context = static_cast<ucontext_t*>(context_pointer);
  greg_t& place = context->uc_mcontext.gregs[REG_RIP];
  const auto* const code = reinterpret_cast<const uint8_t*>(place);
  // VEX: c4, [R X B map], [W vvvv L pp], opcode.
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) fail("an unknown instruction", code);
  if (own == nullptr) {
    const int place = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
    if (place >= 256) fail("more than 256 threads use tiles", code);
    own = &states[place];
  }
  auto& [config, tiles] = *own;
  const int prefix = code[2] & 3, opcode = code[3];
  const Operand operand = read_operand(context, code + 4, code[1], place + 4);
  const auto address = [&](int row) { return reinterpret_cast<uint8_t*>(operand.base + row * operand.index); };
  if (opcode == 0x49 && prefix == 0 && operand.mode != 3 && operand.reg == 0) {
    std::memcpy(&config, reinterpret_cast<uint8_t*>(operand.base + operand.index), sizeof config);
    std::memset(tiles, 0, sizeof tiles);
  } else if (opcode == 0x49 && prefix == 0 && code[4] == 0xc0) {
    config = {};
  } else if (opcode == 0x49 && prefix == 3 && operand.mode == 3 && operand.rm == 0) {
    check_tile(operand.reg, code);
    std::memset(tiles[operand.reg], 0, sizeof tiles[0]);
  } else if (opcode == 0x4b && (prefix == 2 || prefix == 3) && operand.mode != 3 && operand.rm == 4) {
    check_tile(operand.reg, code);
    for (int row = 0; row < 16; ++row) {
      uint8_t* const line = tiles[operand.reg][row];
      prefix == 3 ? std::memcpy(line, address(row), 64) : std::memcpy(address(row), line, 64);
    }
  } else if (opcode == 0x5e && (prefix == 2 || prefix == 3) && operand.mode == 3) {
    const int b = ~code[2] >> 3 & 7;
    for (int tile : {operand.reg, operand.rm, b}) check_tile(tile, code);
    multiply(operand.reg, operand.rm, b, prefix == 3, code);
  } else {
    fail("an unknown instruction", code);
  }
  __atomic_fetch_add(&executed, 1, __ATOMIC_RELAXED);
  place += 4 + operand.length;
}

__attribute__((constructor)) void install() {
  struct sigaction action = {};
  action.sa_sigaction = execute;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) bool cu_fast_emulates_tiles() {
  return true;
}

extern "C" __attribute__((visibility("default"))) long instructions_executed() {
  return executed;
}
