namespace vcore::VCORE_ISA {}
