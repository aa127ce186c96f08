// Every instruction family, in the order in which they are asked. To add an opcode, extend the decoder of its
// family (or write a new family and add its line here).
#include "machine.h"

namespace emu {

bool decode_control(const Statement&, Builder&);   // control.cpp: bra, ret, exit, vote, shfl, elect, nanosleep, ...
bool decode_integer(const Statement&, Builder&);   // integer.cpp: add, mul, shifts, logic, setp, selp, mov, prmt, ...
bool decode_float(const Statement&, Builder&);     // float.cpp: f32, f32x2, f16x2, ex2, lg2, rcp, ...
bool decode_convert(const Statement&, Builder&);   // convert.cpp: cvt, cvta, mapa
bool decode_memory(const Statement&, Builder&);    // memory_ops.cpp: ld, st, atom, red, prefetch
bool decode_mbarrier(const Statement&, Builder&);  // mbarrier.cpp
bool decode_barrier(const Statement&, Builder&);   // barrier.cpp: bar, barrier, barrier.cluster, fence, setmaxnreg
bool decode_tma(const Statement&, Builder&);       // tma.cpp: cp.async.bulk.tensor, cp.reduce.async.bulk.tensor
bool decode_bulk(const Statement&, Builder&);      // bulk.cpp: cp.async.bulk, cp.reduce.async.bulk, bulk groups
bool decode_cp_async(const Statement&, Builder&);  // cp_async.cpp: cp.async and its groups
bool decode_matrix(const Statement&, Builder&);    // matrix.cpp: ldmatrix, stmatrix, movmatrix, mma.sync
bool decode_wgmma(const Statement&, Builder&);     // wgmma.cpp
bool decode_tcgen05(const Statement&, Builder&);   // tcgen05.cpp
bool decode_cluster(const Statement&, Builder&);   // cluster.cpp: cluster launch control, griddepcontrol

const std::vector<Decoder> FAMILIES = {
    decode_integer, decode_float,    decode_convert, decode_control, decode_memory, decode_mbarrier, decode_barrier,
    decode_tma,     decode_bulk,     decode_cp_async, decode_matrix, decode_wgmma,  decode_tcgen05,  decode_cluster,
};

}  // namespace emu
